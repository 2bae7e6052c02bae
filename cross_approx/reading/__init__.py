"""Entries read under limits, held-out ones, chunks and slabs, and what is fitted to them: parts of the searches."""
