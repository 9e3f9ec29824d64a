"""Training histories on the Hugging Face hub: which revisions are the steps, what reading costs."""
