"""ELF layout, routes to 2 MiB pages, warm-up and coverage. Knows nothing of the store."""
