"""The only room that touches private names of transformers and PEFT."""
