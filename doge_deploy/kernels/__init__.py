"""What a plugin is, without any plugin: specs, ahead-of-time compilation, launches."""
