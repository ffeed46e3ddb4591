"""Plans: what to keep, found and compared."""
