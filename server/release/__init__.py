"""What is handed on: the export, its card (model_card.py), list of parts (sbom.py) and signature.py."""
