"""Imported first by tests of `fastgen serve`: skips them where a library of theirs is missing."""

import pytest

for name in ("fastapi", "uvicorn", "prometheus_client", "multipart", "httpx", "openai"):
    pytest.importorskip(name, reason=f"{name} is not installed (extra serve-test)")
