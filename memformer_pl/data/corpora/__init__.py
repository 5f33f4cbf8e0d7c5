"""Sources of documents, one module per kind of source."""
