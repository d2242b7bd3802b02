import pytest

pytest.importorskip("diffusers", reason="needs diffusers")
