// A streamed turn with a tool, over the gateway's WebSocket: node examples/node/session.js ws://127.0.0.1:8080 [TOKEN]
// Node 20 has no WebSocket of its own, so the few lines of RFC 6455 that a client needs are here; nothing to install.
const http = require('node:http'), crypto = require('node:crypto')

function connect(url, onMessage) {
  const headers = { Connection: 'Upgrade', Upgrade: 'websocket', 'Sec-WebSocket-Version': 13 }
  headers['Sec-WebSocket-Key'] = crypto.randomBytes(16).toString('base64')
  return new Promise((resolve, reject) => {
    http.get(url.replace('ws', 'http'), { headers }).on('error', reject).on('upgrade', (_reply, socket, head) => {
      const send = (data, opcode = 1) => {
        const body = Buffer.from(data), mask = crypto.randomBytes(4), short = body.length < 126
        const size = short ? Buffer.from([0x80 | body.length]) : Buffer.from([0xfe, body.length >> 8, body.length & 255])
        for (let i = 0; i < body.length; i++) body[i] ^= mask[i % 4]
        socket.write(Buffer.concat([Buffer.from([0x80 | opcode]), size, mask, body]))
      }
      let rest = head
      const read = () => {
        while (rest.length >= 2) {
          const code = rest[1] & 127, start = code < 126 ? 2 : code === 126 ? 4 : 10
          if (rest.length < start) return
          const size = code < 126 ? code : code === 126 ? rest.readUInt16BE(2) : Number(rest.readBigUInt64BE(2))
          if (rest.length < start + size) return
          const opcode = rest[0] & 15, body = rest.subarray(start, start + size)
          rest = rest.subarray(start + size)
          if (opcode === 9) send(body, 10)
          else if (opcode === 8) { console.error('closed', body.readUInt16BE(0), body.subarray(2).toString()); socket.end() }
          else onMessage(JSON.parse(body), send)
        }
      }
      socket.on('data', (data) => { rest = Buffer.concat([rest, data]); read() })
      resolve({ send: (message) => send(JSON.stringify(message)), close: () => socket.end() })
      read()
    })
  })
}

const weather = { name: 'weather', parameters: { type: 'object', properties: { city: { type: 'string' } } } }
const ask = { type: 'ask', session: 'node', stream: true, options: { tools: [{ type: 'function', function: weather }] } }
let client, id = 1
connect(process.argv[2], (message) => {
  if (message.type === 'welcome') {
    client.send({ ...ask, id, messages: process.argv[4] || 'What is the weather in Paris?' })
  } else if (message.type === 'event' && message.event.type === 'text') {
    process.stdout.write(message.event.text)
    client.send({ type: 'grant', id: message.id, credit: 100 })
  } else if (message.type === 'done') {
    const calls = message.result.message.tool_calls || []
    const results = calls.map((call) => ({ role: 'tool', tool_call_id: call.id, content: 'sunny, 21 degrees' }))
    if (calls.length) client.send({ ...ask, id: ++id, messages: results })
    else { console.log(`\n${JSON.stringify({ turns: id, calls: results.length })}`); client.close() }
  } else if (message.type === 'failed') { console.error(message.error); process.exit(1) }
}).then((opened) => { client = opened; client.send({ type: 'hello', version: 1, token: process.argv[3] || null }) })
