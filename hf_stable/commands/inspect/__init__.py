"""`hf-stable inspect`: what a checkpoint's weights say, streamed."""
