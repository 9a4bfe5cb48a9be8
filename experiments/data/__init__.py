"""Data sets as arrays in memory: where they come from, how they are downloaded and checked."""
