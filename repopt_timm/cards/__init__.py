"""Model cards, and their way to and from the Hugging Face Hub."""
