"""Quality of the model: tasks, perplexity, expert differences."""
