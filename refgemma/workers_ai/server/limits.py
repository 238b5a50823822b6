"""Every limit on what the server accepts, in one place."""

from refgemma.lora.hosted import LIMITS

JSON_BYTES = 4 * 2**20  # of a request's body; the longest text of a page takes 1.6 MB when written in escapes
UPLOAD_BYTES = LIMITS["page"][1] * 2**20 + 2**20  # of an upload's body: the largest adapter, and the form around it
FORM_FIELD_BYTES = 4096  # of the fields beside the file in that form
BODY_SECONDS = 60.0  # for a body to arrive
BODY_RATE = 2**20  # bytes received that extend this by a second
DRAIN_BYTES = 2**28  # of a body that is too large: read and dropped, so that its sender can read the error
DRAIN_SECONDS = 2.0  # for reading and dropping it
UPLOADS = 4  # at a time
REQUESTS = 500  # open at a time, of any kind; more get 429
HEAD_SECONDS = 15.0  # a connection without a request is closed after one to two times this
KEEP_ALIVE = 5  # seconds that a connection stays open between requests

ROWS = 8  # requests generated at a time, per model
WAITING = 64  # requests waiting beside those, per model; more get 429
RECORDED = 4  # requests of the playground at a time: each keeps the logits of all its tokens
RECORDED_BYTES = 2**28  # of logits that such a request may keep

FINETUNES = 100
NAME = 100  # characters of a finetune's name
DESCRIPTION = 1024  # characters of its description

GRACE = 2.0  # seconds for answers to finish once the server is stopping
LAST_GRACE = 5  # seconds after which even clients that do not read are disconnected
