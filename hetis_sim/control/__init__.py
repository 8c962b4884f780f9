"""Everything that decides, above the clock: scheduler, ledger, request life cycle."""
