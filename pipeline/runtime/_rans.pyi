from pipeline.runtime.rans_twin import decode as decode
from pipeline.runtime.rans_twin import encode as encode
