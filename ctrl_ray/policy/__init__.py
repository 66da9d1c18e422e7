"""Pre-trained backbones, and the augmented policy: LoRA, control embeddings, export. The only users of diffusers models."""
