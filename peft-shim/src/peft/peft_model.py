"""`peft.peft_model`."""

from splice.model import PeftModel as PeftModel
from splice.tasks import PeftModelForCausalLM as PeftModelForCausalLM
from splice.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from splice.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from splice.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from splice.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from splice.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
