"""An engine for requests that come at any time, and a server around it.

    from hetis_exec.serving import GenerationParams, start_engine

    with start_engine("model.path=path/to/model", "policy=hetis") as engine:
        for piece in engine.submit("The capital of France is", GenerationParams(max_tokens=16)):
            print(piece.text, end="", flush=True)
"""

from hetis_exec.language.params import GenerationParams
from hetis_exec.language.tokenizer import Tokenizer
from hetis_exec.serving.engine import BusyError, ServingEngine
from hetis_exec.serving.start import start_engine
from hetis_exec.serving.streams import Piece, Stream

__all__ = ["BusyError", "GenerationParams", "Piece", "ServingEngine", "Stream", "Tokenizer", "start_engine"]
