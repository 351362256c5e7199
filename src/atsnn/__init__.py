from .ops import available_backends, use_backend
