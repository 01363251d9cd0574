"""Models of other people: Hugging Face folders and GGUF files become runs of ours."""
