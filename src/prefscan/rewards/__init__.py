"""One module a kind of known reward: texts with their prompts in, a number each out."""
