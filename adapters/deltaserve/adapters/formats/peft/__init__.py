"""Hugging Face PEFT's save format: adapter_config.json and adapter_model.safetensors."""
