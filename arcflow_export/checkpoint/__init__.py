"""Read checkpoints: find and download them, read tensors one at a time, check adapters and LoRAs, merge."""
