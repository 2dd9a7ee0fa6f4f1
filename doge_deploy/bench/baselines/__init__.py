"""What a bundle is compared with: what people run who do not have this tool."""
