"""What the API reads and writes. Unknown parameters are errors."""
