import pytest

from bnexport.data import decoded


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts builds."""
    calls: list[str] = []
    really = decoded._build
    monkeypatch.setattr(decoded, "_build", lambda *given: [calls.append(given[0].name), really(*given)][1])
    return calls
