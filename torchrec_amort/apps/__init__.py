"""What is launched: one module for each command."""
