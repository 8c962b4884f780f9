"""Real models: architectures, weights and what each worker computes of them with torch."""
