"""What the server tells."""

from server.api.parameters import EXAMPLE_RESPONSE, EXAMPLE_SESSION, EXAMPLE_STREAM
from server.api.schemas.base import AnswerModel
from server.api.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    TokenLogprob,
    TopLogprob,
)
from server.api.schemas.completions import Completion, CompletionChoice, CompletionLogprobs
from server.api.schemas.generation import PromptTokensDetails, Timings, Usage
from server.api.schemas.models import Health, Model, ModelList
from server.api.schemas.problems import ErrorDetail, ErrorResponse
from server.api.schemas.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponseDeleted,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
    ToldFormat,
)
from server.api.schemas.sessions import (
    Checkpoint,
    CheckpointList,
    Parent,
    Session,
    SessionDeleted,
    SessionList,
)
from server.api.schemas.streams import StreamDeleted, StreamInfo
from server.api.schemas.tokens import Detokenized, Tokenized, TokenizerInfo

TIME = 1_767_225_600
FINGERPRINT = "fp_3b1c9a7d52e0"

USAGE = Usage(
    prompt_tokens=6,
    completion_tokens=3,
    total_tokens=9,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=2),
)
TIMINGS = Timings(
    queue_s=0.0004,
    prefill_s=0.0031,
    first_token_s=0.0042,
    per_token_s=0.0011,
    total_s=0.0064,
    cached_tokens=2,
    resumed_tokens=0,
)
TOP = TopLogprob(token=" dog", logprob=-1.93, bytes=list(b" dog"))
LOGPROB = TokenLogprob(token=" cat", logprob=-0.31, bytes=list(b" cat"), top_logprobs=[TOP])
LOGPROBS = ChatLogprobs(content=[LOGPROB])
COMPLETION_LOGPROBS = CompletionLogprobs(
    tokens=[" the"],
    token_logprobs=[-0.27],
    top_logprobs=[{" the": -0.27, " a": -2.05}],
    text_offset=[14],
)
PROMPT_IDS, TEXT_IDS = [1, 71, 24, 9, 30, 11], [7, 205, 2]

COMPLETION = Completion(
    id="cmpl-0a6d3e91f7c24b58a3e6d90b17f4c2d8",
    created=TIME,
    model="latentd",
    system_fingerprint=FINGERPRINT,
    choices=[CompletionChoice(index=0, text=" the mat.", logprobs=None, finish_reason="stop")],
    usage=USAGE,
    session_id=EXAMPLE_SESSION,
    session_turn=4,
    timings=TIMINGS,
)
CHAT = ChatCompletion(
    id=EXAMPLE_STREAM,
    created=TIME,
    model="latentd",
    system_fingerprint=FINGERPRINT,
    choices=[
        ChatChoice(
            index=0,
            message=AssistantMessage(role="assistant", content="The cat.", refusal=None),
            logprobs=None,
            finish_reason="stop",
        )
    ],
    usage=USAGE,
    session_id=EXAMPLE_SESSION,
    session_turn=4,
    timings=TIMINGS,
    prompt_token_ids=PROMPT_IDS,
)
CHUNK = ChatChunk(
    id=EXAMPLE_STREAM,
    created=TIME,
    model="latentd",
    system_fingerprint=FINGERPRINT,
    choices=[
        ChatChunkChoice(index=0, delta=Delta(content=" cat"), logprobs=LOGPROBS, finish_reason=None)
    ],
    usage=USAGE,
    session_id=EXAMPLE_SESSION,
    session_turn=4,
    timings=TIMINGS,
    prompt_token_ids=PROMPT_IDS,
)
CHOICES = (
    COMPLETION.choices[0],
    CompletionChoice(
        index=0,
        text=" the",
        logprobs=COMPLETION_LOGPROBS,
        stop_reason="\n\n",
        token_ids=TEXT_IDS,
        prompt_token_ids=PROMPT_IDS,
    ),
    CHAT.choices[0],
    ChatChoice(
        index=0,
        message=CHAT.choices[0].message,
        logprobs=LOGPROBS,
        finish_reason="stop",
        stop_reason="\n\n",
        token_ids=TEXT_IDS,
    ),
    CHUNK.choices[0],
    ChatChunkChoice(
        index=0, delta=Delta(), finish_reason="stop", stop_reason="\n\n", token_ids=TEXT_IDS
    ),
    CHAT.choices[0].message,
    Delta(role="assistant", content=""),
    TOP,
    LOGPROB,
    LOGPROBS,
    COMPLETION_LOGPROBS,
    USAGE,
    USAGE.prompt_tokens_details,
    TIMINGS,
)

PART = OutputText(type="output_text", text="The cat.", annotations=[], logprobs=[])
MESSAGE = OutputMessage(
    id="msg_7d1f0a52c8e94b63a1f2d3c4b5a69788",
    type="message",
    status="completed",
    role="assistant",
    content=[PART],
)
RESPONSE_USAGE = ResponseUsage(
    input_tokens=6,
    input_tokens_details=InputTokensDetails(cached_tokens=2),
    output_tokens=3,
    output_tokens_details=OutputTokensDetails(),
    total_tokens=9,
)
FORMAT = ToldFormat(format={"type": "text"})
FAULT = ResponseError(code="internal_error", message="the server failed; its log tells more")
CUT = IncompleteDetails(reason="max_output_tokens")
RESPONSE = ResponseObject(
    id=EXAMPLE_RESPONSE,
    created_at=TIME,
    completed_at=TIME + 1,
    status="completed",
    background=False,
    error=None,
    incomplete_details=None,
    instructions="Answer in one word.",
    max_output_tokens=16,
    model="latentd",
    output=[MESSAGE],
    previous_response_id=None,
    store=True,
    temperature=1.0,
    text=FORMAT,
    tools=[],
    top_logprobs=0,
    top_p=1.0,
    usage=RESPONSE_USAGE,
    user="user-17",
    metadata={"topic": "cats"},
    timings=TIMINGS,
)
RESPONSES = (
    RESPONSE,
    RESPONSE.model_copy(
        update={
            "previous_response_id": "resp_Zc81Lw0uYb4NqEsVtKx6RmJaPgDhOi2f",
            "error": FAULT,
            "incomplete_details": CUT,
        }
    ),
    ResponseEvent(
        type="response.output_text.delta",
        sequence_number=4,
        output_index=0,
        item_id=MESSAGE.id,
        content_index=0,
        delta=" cat",
        logprobs=[LOGPROB],
    ),
    ResponseEvent(
        type="response.output_item.done",
        sequence_number=8,
        response=RESPONSE,
        item=MESSAGE,
        part=PART,
        text="The cat.",
    ),
    MESSAGE,
    PART,
    OutputText(text="The cat.", logprobs=[LOGPROB]),
    RESPONSE_USAGE,
    RESPONSE_USAGE.input_tokens_details,
    RESPONSE_USAGE.output_tokens_details,
    FORMAT,
    FAULT,
    CUT,
    ResponseDeleted(id=EXAMPLE_RESPONSE),
)

PARENT = Parent(session_id="sess_w8Rk3TzB5nQ0yVj6XcLmHd1sPaGfEu9o", turn=2)
SESSION = Session(
    id=EXAMPLE_SESSION,
    created_at=TIME + 0.5,
    last_used_at=TIME + 60.25,
    expires_at=TIME + 3660.25,
    ttl=3600.0,
    turn=3,
    checkpoints=3,
    tokens=412,
    state_bytes=1_622_016,
    tier="device",
    status="idle",
    parent=PARENT,
    metadata={"topic": "cats"},
)
CHECKPOINT = Checkpoint(turn=3, tokens=412, created_at=TIME + 60.25, bytes=1_623_104)
SESSIONS = (
    SESSION,
    PARENT,
    SessionList(data=[SESSION], first_id=EXAMPLE_SESSION, last_id=EXAMPLE_SESSION, has_more=False),
    SessionDeleted(id=EXAMPLE_SESSION),
    CHECKPOINT,
    CheckpointList(data=[CHECKPOINT]),
)

MODEL = Model(
    id="latentd",
    created=TIME,
    parameters=30_142_976,
    vocab_size=8192,
    state_bytes=1_622_016,
    max_prompt_tokens=131_072,
    max_tokens=65_536,
    chat=True,
)
PROBLEM = ErrorDetail(
    message="temperature: Input should be less than or equal to 10, not 11",
    type="invalid_request_error",
    param="temperature",
    code="invalid_value",
)
OTHERS = (
    StreamInfo(
        id=EXAMPLE_STREAM,
        created_at=TIME + 0.5,
        status="completed",
        events=5,
        expires_at=TIME + 301.0,
    ),
    StreamDeleted(id=EXAMPLE_STREAM),
    Tokenized(
        count=3, tokens=[1, 71, 24], token_strs=["<|begin|>", "The", " cat"], max_model_len=None
    ),
    Detokenized(prompt="The cat"),
    TokenizerInfo(
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token=None,
        vocab_size=8192,
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    ),
    MODEL,
    ModelList(data=[MODEL]),
    Health(),
    PROBLEM,
    ErrorResponse(error=PROBLEM),
)

ANSWERS: tuple[AnswerModel, ...] = (
    COMPLETION,
    CHAT,
    CHUNK,
    *CHOICES,
    *RESPONSES,
    *SESSIONS,
    *OTHERS,
)
