"""``python -m hetis_sim``."""

from hetis_sim.cli import main

if __name__ == "__main__":
    main()
