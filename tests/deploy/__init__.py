"""What deploy/ says, checked by the programs that read it."""
