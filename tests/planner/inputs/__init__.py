"""What the planner reads: flags, clusters, Hugging Face configurations."""
