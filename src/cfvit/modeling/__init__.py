"""The method: equations, the two stages, the exit, their cost."""
