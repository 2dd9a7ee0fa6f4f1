"""What a bundle is held against: what people run who do not have this tool."""
