"""A model made for backward inference: ``bon train flip`` trains a LoRA adapter on pairs of instruction and answer."""
