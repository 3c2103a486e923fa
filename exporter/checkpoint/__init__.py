"""Reading Hugging Face checkpoints in bounded memory."""
