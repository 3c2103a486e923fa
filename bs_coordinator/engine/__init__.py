"""Token generation: from prompts to answers, one forward step after another."""
