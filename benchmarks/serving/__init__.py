"""What ``slora-jax bench`` measures with, and the systems it compares; see README.md."""
