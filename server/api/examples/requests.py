"""What clients may send. The first of each kind is one that any server takes; the others show what
the first leaves away, each parameter by itself."""

from server.api.parameters import EXAMPLE_RESPONSE, EXAMPLE_SESSION
from server.api.schemas.base import RequestModel
from server.api.schemas.chat import ChatRequest, Message, TextPart
from server.api.schemas.completions import CompletionRequest
from server.api.schemas.generation import GenerationRequest, SamplingRequest, StreamOptions
from server.api.schemas.responses import (
    InputMessage,
    InputPart,
    JsonSchemaText,
    ResponseRequest,
    ResponseStreamOptions,
    TextOptions,
)
from server.api.schemas.sessions import CreateSessionRequest, ForkRequest, RewindRequest
from server.api.schemas.structure import (
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedSchema,
    StructuredOutputs,
    TextFormat,
)
from server.api.schemas.tokens import DetokenizeRequest, TokenizeRequest

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}

QUESTION = Message(role="user", content="Who sat on the mat?")
STREAM_OPTIONS = StreamOptions(include_usage=True, continuous_usage_stats=False)
NAMED = NamedSchema.model_validate(
    {"name": "person", "description": "Somebody.", "schema": PERSON, "strict": True}
)
FORMAT = JsonSchemaFormat(type="json_schema", json_schema=NAMED)
FORMAT_OF_TEXT = JsonSchemaText.model_validate(
    {"type": "json_schema", "name": "person", "schema": PERSON}
)
OUTPUTS = StructuredOutputs(choice=["yes", "no"])

SAMPLING = SamplingRequest(
    model="latentd",
    min_tokens=1,
    temperature=0.7,
    top_p=0.95,
    top_k=40,
    min_p=0.05,
    repetition_penalty=1.1,
    frequency_penalty=0.2,
    presence_penalty=0.1,
    logit_bias={"42": -100.0},
    seed=7,
    stop=["\n\n"],
    stop_token_ids=[2],
    include_stop_str_in_output=False,
    ignore_eos=False,
    stream=True,
    timings=True,
    timeout=5.0,
    user="user-17",
    structured_outputs=OUTPUTS,
)
GENERATION = GenerationRequest(
    session_id=EXAMPLE_SESSION,
    expected_turn=3,
    max_tokens=16,
    n=1,
    stream_options=STREAM_OPTIONS,
    resumable=True,
    response_format=FORMAT,
    return_token_ids=True,
)
COMPLETIONS = (
    CompletionRequest(prompt="The cat sat on", max_tokens=16),
    CompletionRequest(prompt=[1, 2, 3], echo=True, logprobs=2, best_of=2),
)
CHATS = (
    ChatRequest(messages=[QUESTION], max_completion_tokens=16),
    ChatRequest(
        messages=[],
        logprobs=True,
        top_logprobs=2,
        metadata={"topic": "cats"},
        safety_identifier="user-17",
        prompt_cache_key="cats",
        prompt_cache_retention="24h",
        service_tier="auto",
    ),
)
RESPONSES = (
    ResponseRequest(input="Who sat on the mat?", max_output_tokens=16),
    ResponseRequest(
        instructions="Answer in one word.",
        previous_response_id=EXAMPLE_RESPONSE,
        store=True,
        background=False,
        metadata={"topic": "cats"},
        ttl=3600.0,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
        text=TextOptions(format=FORMAT_OF_TEXT),
        stream_options=ResponseStreamOptions(),
        truncation="disabled",
        service_tier="auto",
        safety_identifier="user-17",
        prompt_cache_key="cats",
        prompt_cache_retention="24h",
    ),
)
SESSIONS = (
    CreateSessionRequest(metadata={"topic": "cats"}, ttl=3600.0, prompt="Once upon a time"),
    CreateSessionRequest(response_id=EXAMPLE_RESPONSE),
    ForkRequest(metadata={"topic": "dogs"}, ttl=3600.0),
    ForkRequest(turn=1),
    RewindRequest(turn=1),
)
TOKENS = (
    TokenizeRequest(prompt="The cat sat on"),
    TokenizeRequest(
        model="latentd", messages=[QUESTION], add_special_tokens=True, return_token_strs=True
    ),
    DetokenizeRequest(tokens=[1, 2, 3]),
    DetokenizeRequest(model="latentd", tokens=[1]),
)
PARTS = (
    QUESTION,
    Message(role="user", content=[TextPart(type="text", text="Who?")], name="Ada"),
    TextPart(type="text", text="Who sat on the mat?"),
    InputMessage(role="user", content=[InputPart(type="input_text", text="Who?")]),
    InputMessage(
        type="message",
        role="assistant",
        content="The cat.",
        id="msg_7d1f0a52c8e94b63a1f2d3c4b5a69788",
        status="completed",
        phase="final_answer",
    ),
    InputPart(type="input_text", text="Who sat on the mat?", logprobs=[]),
    STREAM_OPTIONS,
    ResponseStreamOptions(),
    TextOptions(format=FORMAT_OF_TEXT),
    NAMED,
    FORMAT,
    FORMAT_OF_TEXT,
    JsonSchemaText.model_validate(
        {"type": "json_schema", "name": "person", "description": "Somebody.", "strict": True}
    ),
    JsonObjectFormat(type="json_object"),
    TextFormat(type="text"),
    OUTPUTS,
    StructuredOutputs.model_validate({"json": PERSON}),
    StructuredOutputs(json_object=True),
    StructuredOutputs(regex="[0-9]{4}"),
    StructuredOutputs(grammar='root ::= "yes" | "no"'),
)

REQUESTS: tuple[RequestModel, ...] = (
    *COMPLETIONS,
    *CHATS,
    *RESPONSES,
    *SESSIONS,
    *TOKENS,
    *PARTS,
    GENERATION,
    SAMPLING,
)
