"""Process groups, and errors that reach every rank."""
