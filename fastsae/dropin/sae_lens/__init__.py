"""Accelerated classes of SAELens."""

from .inference import FastAbsTopKSAE as FastAbsTopKSAE
from .inference import FastGatedSAE as FastGatedSAE
from .inference import FastJumpReLUSAE as FastJumpReLUSAE
from .inference import FastJumpReLUSkipTranscoder as FastJumpReLUSkipTranscoder
from .inference import FastJumpReLUTranscoder as FastJumpReLUTranscoder
from .inference import FastSkipTranscoder as FastSkipTranscoder
from .inference import FastStandardSAE as FastStandardSAE
from .inference import FastTopKSAE as FastTopKSAE
from .inference import FastTranscoder as FastTranscoder
from .training import FastAbsTopKTrainingSAE as FastAbsTopKTrainingSAE
from .training import FastBatchTopKTrainingSAE as FastBatchTopKTrainingSAE
from .training import FastGatedTrainingSAE as FastGatedTrainingSAE
from .training import FastJumpReLUTrainingSAE as FastJumpReLUTrainingSAE
from .training import FastMatryoshkaBatchTopKTrainingSAE as FastMatryoshkaBatchTopKTrainingSAE
from .training import FastStandardTrainingSAE as FastStandardTrainingSAE
from .training import FastTopKTrainingSAE as FastTopKTrainingSAE
