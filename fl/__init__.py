"""Federated learning with personal quantized models: clients, a server, and what passes between them."""
