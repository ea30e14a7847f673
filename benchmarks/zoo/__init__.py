"""The fold of many networks of torchvision and timm, next to other tools."""
