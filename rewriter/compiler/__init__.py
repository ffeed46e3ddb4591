"""The torch.compile backend.

`rewriter_backend` is what the entry point `torch_dynamo_backends` names, so torch finds it without
an import of this package.
"""

from rewriter.compiler.backends import Backend, backend, rewriter_backend

__all__ = ["Backend", "backend", "rewriter_backend"]
