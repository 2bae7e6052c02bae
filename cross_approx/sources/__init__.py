"""Where entries come from: memory, functions, stores in chunks, clusters; and views of other sources."""
