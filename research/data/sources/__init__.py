"""Data sources: each file turns one storage format into a `DataSet` of random-access splits."""
