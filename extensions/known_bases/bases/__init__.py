"""Vector indexes on faiss, one file for each."""
