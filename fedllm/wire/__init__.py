"""The wire: the codec that turns payloads into bytes, and layers that make them fewer."""
