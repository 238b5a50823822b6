"""How much of anything the server takes from a stranger, in one place."""

from refgemma.lora.hosted import LIMITS

JSON_BYTES = 4 * 2**20  # body of a request; the longest text of a page, written in escapes, takes 1.6 MB
UPLOAD_BYTES = LIMITS["page"][1] * 2**20 + 2**20  # body of an upload: the largest adapter, and the form around it
FORM_FIELD_BYTES = 4096  # what stands beside the file in that form
BODY_SECONDS = 60.0  # that a body may take, after which its sender is given up
BODY_RATE = 2**20  # bytes of it that earn one second more
DRAIN_BYTES = 2**28  # of a body that is too large: taken and dropped, so that its sender gets to read why
DRAIN_SECONDS = 2.0  # that it may take
UPLOADS = 4  # at a time
REQUESTS = 500  # open at a time, whatever for; more get 429
HEAD_SECONDS = 15.0  # twice this at most without a whole head of a request, and a connection is closed
KEEP_ALIVE = 5  # seconds that one is held between requests

ROWS = 8  # requests that write at a time, a model
WAITING = 64  # requests that wait beside those, a model; more get 429
RECORDED = 4  # requests of the playground at a time: each keeps the logits of all its tokens
RECORDED_BYTES = 2**28  # that such a request may keep

FINETUNES = 100
NAME = 100  # characters of a finetune's name
DESCRIPTION = 1024  # characters of its description

GRACE = 2.0  # seconds that answers have to finish once the server is told to stop
LAST_GRACE = 5  # seconds after which even readers who take nothing are cut off
