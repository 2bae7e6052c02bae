"""All entries of a source too large for memory, in passes over its chunks: Gram matrices and sketches."""
