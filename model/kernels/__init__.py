"""What networks of all families compute with."""
