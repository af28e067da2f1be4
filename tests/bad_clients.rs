//! Clients that leave, stall, dribble or overdo it, on real sockets: others are served meanwhile,
//! and nothing that belonged to them stays.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use moewe::server::{App, ServerConfig, listen};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};

use crate::server::{CHAT, check_error, get, hello, post, start, until};

/// Serves on loopback until the test ends.
async fn serve(app: &Arc<App>) -> SocketAddr {
    let socket = TcpSocket::new_v4().unwrap();
    // Small, so that a client that reads nothing is noticed after a few tokens.
    socket.set_send_buffer_size(4096).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener: TcpListener = socket.listen(1024).unwrap();
    let address = listener.local_addr().unwrap();
    let never = std::future::pending;
    tokio::spawn(listen(listener, app.clone(), never(), never()));
    address
}

/// A chat request for a stream, as bytes.
fn chat(extra: serde_json::Value) -> Vec<u8> {
    let mut body = hello(json!({"stream": true, "max_tokens": 200, "ignore_eos": true}));
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let body = body.to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let reading = timeout(Duration::from_secs(10), stream.read_to_end(&mut bytes));
    // A reset is an end too.
    let _ = reading.await.expect("the server closes");
    String::from_utf8(bytes).unwrap()
}

/// All is as if nobody had called.
async fn all_is_free(app: &Arc<App>) {
    until("all blocks are free", || {
        let stats = app.engine.stats();
        app.engine.n_open() == 0 && stats.running + stats.waiting + stats.kv_blocks_used == 0
    })
    .await;
    let metrics = get(app, "/metrics").await.2;
    for name in ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"] {
        let line = metrics.lines().find(|l| l.starts_with(&format!("vllm:{name}{{"))).unwrap();
        assert!(line.ends_with(" 0"), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_killed_mid_stream_leave_no_block_behind() {
    let app = start(ServerConfig::default());
    let address = serve(&app).await;
    let mut seed = 7u64;
    for round in 0..40 {
        let mut clients = Vec::new();
        for _ in 0..5 {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(&chat(json!({"n": 1 + round % 2}))).await.unwrap();
            clients.push(client);
        }
        for (i, mut client) in clients.into_iter().enumerate() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round);
            // Some leave in the queue, some in the prompt, some among the tokens.
            if i > 0 {
                let mut some = vec![0; 1 + (seed >> 40) as usize % 900];
                let _ = timeout(Duration::from_millis(seed >> 59), client.read(&mut some)).await;
            }
            // Not closed, but reset, as when a process is killed with unread data.
            client.set_zero_linger().unwrap();
        }
    }
    all_is_free(&app).await;
    assert_eq!(post(&app, CHAT, &hello(json!({}))).await.0, 200);
    all_is_free(&app).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_is_cut_off_and_others_are_not() {
    let write_timeout = Duration::from_millis(300);
    let app = start(ServerConfig { write_timeout, ..ServerConfig::default() });
    let address = serve(&app).await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(2048).unwrap();
        let mut client = socket.connect(address).await.unwrap();
        let loud = json!({"logprobs": true, "top_logprobs": 20});
        client.write_all(&chat(loud)).await.unwrap();
        silent.push(client);
    }
    until("they run", || app.engine.stats().running > 0).await;
    let (status, ..) = post(&app, CHAT, &hello(json!({}))).await;
    assert_eq!(status, 200);
    all_is_free(&app).await;
    for client in &mut silent {
        let text = read_to_end(client).await;
        assert!(!text.contains("[DONE]"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_senders_are_closed_while_others_are_served() {
    let app = start(ServerConfig {
        header_timeout: Duration::from_millis(500),
        body_timeout: Duration::from_millis(500),
        ..ServerConfig::default()
    });
    let address = serve(&app).await;
    let whole = chat(json!({}));
    let head = whole.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    let mut tasks = Vec::new();
    for i in 0..200 {
        // Half of them dribble the header, half the body.
        let (at_once, rest) = whole.split_at(if i % 2 == 0 { 10 } else { head });
        let (at_once, rest) = (at_once.to_vec(), rest.to_vec());
        tasks.push(tokio::spawn(async move {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(&at_once).await.unwrap();
            let (mut reader, mut writer) = client.split();
            let dribble = async {
                for byte in rest {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    if writer.write_all(&[byte]).await.is_err() {
                        break;
                    }
                }
                std::future::pending::<()>().await;
            };
            let mut answer = Vec::new();
            tokio::select! {
                () = dribble => {}
                _ = reader.read_to_end(&mut answer) => {}
            }
            String::from_utf8(answer).unwrap()
        }));
    }
    for _ in 0..3 {
        assert_eq!(post(&app, CHAT, &hello(json!({}))).await.0, 200);
    }
    for (i, task) in tasks.into_iter().enumerate() {
        let answer = timeout(Duration::from_secs(15), task).await.expect("closed").unwrap();
        // A header that is no header yet cannot be answered.
        assert_eq!(answer.contains("408") && answer.contains("\"error\""), i % 2 == 1, "{answer}");
    }
    assert_eq!(app.engine.n_open(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hyper_refuses_has_an_error_object_too() {
    let app = start(ServerConfig::default());
    let address = serve(&app).await;
    let many: String = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect();
    for (request, status) in [
        (
            format!(
                "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx: {}\r\n\r\n",
                "y".repeat(70 << 10)
            ),
            431,
        ),
        (
            format!(
                "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx: {}\r\n\r\n",
                "y".repeat(4 << 20)
            ),
            431,
        ),
        (format!("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{many}\r\n"), 431),
        ("GET / HTTP/1.1\r\nno colon here\r\n\r\n".to_owned(), 400),
        ("\u{1}\u{2}\u{3}\r\n\r\n".to_owned(), 400),
    ] {
        let mut client = TcpStream::connect(address).await.unwrap();
        // The server may close before all has been sent.
        let _ = client.write_all(request.as_bytes()).await;
        let answer = read_to_end(&mut client).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("application/json"), "{head}");
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["error"]["code"], status, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_refuses_before_it_reads_the_body() {
    let app = start(ServerConfig { max_jobs: 1, ..ServerConfig::default() });
    let address = serve(&app).await;
    let mut first = TcpStream::connect(address).await.unwrap();
    first.write_all(&chat(json!({}))).await.unwrap();
    until("it runs", || app.engine.stats().running == 1).await;
    let mut second = TcpStream::connect(address).await.unwrap();
    let whole = chat(json!({"user": "x".repeat(1 << 20)}));
    // The header and no more.
    second.write_all(&whole[..200.min(whole.len())]).await.unwrap();
    let mut start = [0; 4096];
    let n = timeout(Duration::from_secs(2), second.read(&mut start)).await.expect("at once");
    let answer = String::from_utf8_lossy(&start[..n.unwrap()]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("retry-after: 1\r\n"), "{answer}");
    drop(first);
    all_is_free(&app).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_answered_or_refused_and_then_gone() {
    let app = start(ServerConfig { max_jobs: 64, ..ServerConfig::default() });
    let asked = (0..300).map(|_| {
        let app = app.clone();
        tokio::spawn(async move { post(&app, CHAT, &hello(json!({"max_tokens": 4}))).await })
    });
    let (mut served, mut refused) = (0, 0);
    for answer in asked.collect::<Vec<_>>() {
        let answer = answer.await.unwrap();
        match answer.0.as_u16() {
            200 => served += 1,
            _ => {
                check_error(503, None, &answer);
                refused += 1;
            }
        }
    }
    assert!(served >= 64 && refused > 0, "{served} served, {refused} refused");
    all_is_free(&app).await;
}
