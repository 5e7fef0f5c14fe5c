"""Training a network on text, and measuring what it has learned."""
